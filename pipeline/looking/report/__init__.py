"""report.html: inputs and edits side by side."""
