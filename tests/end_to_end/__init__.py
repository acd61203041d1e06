"""Whole jobs on the real stack; a package, so that its engine ends with the last of its tests."""
