"""What the cards and links at hand really give: timings of a few minutes, and the figures that explain them."""
