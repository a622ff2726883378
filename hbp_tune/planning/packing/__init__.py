"""How a plan is made: groups, packs, balanced micro-steps, curricula."""
