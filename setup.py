from setuptools import find_packages, setup

# eepass/passes, eepass/codegen and eepass/runtime are links to the folders beside it
setup(packages=find_packages(include=["eepass", "eepass.*"]))
