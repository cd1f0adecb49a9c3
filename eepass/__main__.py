from eepass.cli.main import main

main()
