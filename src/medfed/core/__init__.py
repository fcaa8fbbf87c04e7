"""What every part stands on: errors, named randomness, flat parameters, the byte codec. Imports
nothing of medfed.
"""
