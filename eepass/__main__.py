from eepass.cli import main

main()
