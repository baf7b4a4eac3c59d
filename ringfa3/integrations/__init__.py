"""Other people's libraries with ringfa3's attention; each module imports its library, so import the one you need."""
