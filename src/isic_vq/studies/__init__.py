"""Studies: many models trained alike, to see what one choice does. They train, measure and compare; nothing imports them."""
