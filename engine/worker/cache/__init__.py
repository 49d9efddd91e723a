"""What a worker keeps of finished prefixes: pages, tails, and what is told of them."""
