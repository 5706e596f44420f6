"""What generates and what trains. Only `online_dpo.cli` and `backends.factory` choose among these."""
