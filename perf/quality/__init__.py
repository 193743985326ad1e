"""The paper's comparison in the small: the same bytes for every kind of attention, trained short and read long."""
