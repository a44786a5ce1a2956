"""What tests run on several ranks: each is started once a rank by conftest.run_ranks."""
