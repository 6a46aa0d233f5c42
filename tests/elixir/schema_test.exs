defmodule StarweaveImage.SchemaTest do
  # What casts, describes and declares what comes from outside.
  use ExUnit.Case, async: true

  alias StarweaveImage.{Config, Options, Schema, Type}

  doctest Type
  doctest Options
  doctest Schema
  doctest Config
end
