"""How many tokens a decode drafts."""
