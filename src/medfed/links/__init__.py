"""What a row goes through on its way to the server, and how rows become one."""
