"Installed as `seats_analysis._tasks`: see DATA in setup.py."
