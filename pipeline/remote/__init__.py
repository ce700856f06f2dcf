"""Servers that answer over HTTP, judges of edits and editors: one client, one journal, one way of waiting."""
