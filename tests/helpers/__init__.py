"""What several test files share: tiny models, recipes, images, scripts and a Hub."""
