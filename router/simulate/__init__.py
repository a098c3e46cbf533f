"""`python -m router.simulate`: the router's own core in virtual time, to compare policies and to choose settings."""
