"Installed as `seats_analysis._reported`: see DATA in setup.py."
