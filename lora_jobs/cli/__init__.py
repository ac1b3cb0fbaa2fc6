"""Parse, call one workflow, show one value, return a status."""
