"Installed as `seats_analysis._testbed`: see DATA in setup.py."
