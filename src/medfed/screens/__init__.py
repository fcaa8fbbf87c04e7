"""What people look at: pages, console, reports, exporters."""
