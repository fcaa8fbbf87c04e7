"""Awkward tables, made by code: each with its right answer. `forms` writes one clean table in every
form.
"""
