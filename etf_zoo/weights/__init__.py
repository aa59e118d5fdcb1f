"""Where weights come from. Reading only."""
