"""The texts: prepare.py makes them; each dataset has a folder here."""
