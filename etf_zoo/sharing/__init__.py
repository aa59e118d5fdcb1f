"""Model folders, their cards, publishing and export."""
