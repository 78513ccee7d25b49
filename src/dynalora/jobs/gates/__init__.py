"""The job of `dynalora gates`: where an adapter's gates open over text of several domains."""
