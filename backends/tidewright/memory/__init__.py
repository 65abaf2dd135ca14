"""Who has a device's memory: the account, what is reclaimed first when it runs short, and how short it is."""
