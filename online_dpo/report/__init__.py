"""The report of a comparison: one HTML file that needs nothing else, the same tables as Markdown and JSON, figures."""
