"""Other people's frameworks; each module is imported only where its framework is used."""
