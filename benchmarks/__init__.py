"""Programs that print a roofline, a measurement and one JSON line."""
