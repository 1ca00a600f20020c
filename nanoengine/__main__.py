"""`python -m nanoengine`."""

from nanoengine.cli import main

if __name__ == "__main__":
    main()
