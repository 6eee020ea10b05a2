"Installed as `seats_analysis._schedules`: see DATA in setup.py."
