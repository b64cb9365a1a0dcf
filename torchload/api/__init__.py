"""The public functions, one module each: walks through the five stages (open, select, match, plan, transfer)."""
