"""Many short runs beside one model: what they share."""
