"""`dynalora compact`: an adapter without its dead components."""
