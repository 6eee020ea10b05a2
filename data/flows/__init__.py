"Installed as `seats_analysis._flows`: see DATA in setup.py."
