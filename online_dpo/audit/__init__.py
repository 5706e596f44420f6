"""How far a judge can be trusted: measured (`auditing`), printed (`display`) and drawn (`figures`)."""
