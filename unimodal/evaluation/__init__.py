"""How trained models are scored: protocols, scores and the page that shows them."""
