"""Jobs: requests that are kept in a database and answered later."""
