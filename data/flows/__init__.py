"Installed as `seats_analysis._profiles`: see DATA in setup.py."
