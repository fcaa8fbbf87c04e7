"""Engines: what carries bytes between the coordinator and the sites."""
