"""Looks at an unknown archive and drafts its description."""
