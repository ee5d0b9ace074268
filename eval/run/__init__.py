"""From a config file to finished runs: planning, launching, watching, collecting."""
