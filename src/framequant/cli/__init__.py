"""The command line, one file per subcommand; torch and transformers are imported inside the commands only."""
