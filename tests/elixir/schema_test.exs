defmodule StarweaveImage.SchemaTest do
  # What casts, describes and declares what comes from outside.
  use ExUnit.Case, async: true

  alias StarweaveImage.{Config, Options, Schema, TestJSON, Type}

  doctest Type
  doctest Options
  doctest Schema
  doctest Config
  doctest StarweaveImage.Mix.CommandLine
  doctest StarweaveImage.Mix.Progress

  describe "tests/contract/schema.json, which the Python side is held to likewise, has" do
    test "the request" do
      # Each request has them by the time that it is sent; what is left of its time is no default.
      ours = %{"prompt" => required(:prompt), "id" => required(:id), "timeout_ms" => timeout()}

      assert_same(Map.merge(facts(Schema.groups(), [:picture, :sent]), ours), "request")
    end

    test "the configuration" do
      ours = facts(Config.groups(), [:sent])
      # A model is a map there and a tuple here.
      words = "a list of at most 1024 maps with id, path, revision, sha256 and fallbacks"
      assert ours["models"]["must_be"] =~ "a list of at most 1024 model ids"
      assert_same(put_in(ours["models"]["must_be"], words), "config")
    end
  end

  defp assert_same(ours, part) do
    theirs =
      "tests/contract/schema.json" |> File.read!() |> TestJSON.decode!() |> Map.fetch!(part)

    assert Enum.sort(Map.keys(ours)) == Enum.sort(Map.keys(theirs))
    for {name, facts} <- ours, do: assert({name, facts} == {name, theirs[name]})
  end

  defp facts(groups, roles) do
    wire = for role <- roles, {name, wire, _} <- Options.with_role(groups, role), do: {name, wire}

    for {name, {type, default, _doc}} <- Options.schema(groups), wire[name], into: %{} do
      {Atom.to_string(wire[name]), type |> facts() |> Map.merge(default(type, default))}
    end
  end

  defp facts(type), do: Map.put(parameters(type), "must_be", Type.describe(type))

  defp parameters(:id), do: text("id", 1, 128)
  defp parameters(:prompt), do: text("prompt", 1, 8192)
  defp parameters(:model_id), do: text("model_id", 1, 256)
  defp parameters(:scheduler), do: text("scheduler", 1, 64)
  defp parameters(:image), do: text("image", 12, 12_582_912)
  defp parameters({:text, min, max}), do: text("text", min, max)
  defp parameters(name) when is_atom(name), do: %{"type" => Atom.to_string(name)}
  defp parameters({:number, min, max}), do: %{"type" => "number", "min" => min, "max" => max}

  defp parameters({:multiple_of, n, min, max}),
    do: Map.put(parameters({:integer, min, max}), "multiple_of", n)

  defp parameters({name, min, max}) when name in [:integer, :ms, :bytes],
    do: %{"type" => "integer", "min" => min, "max" => max}

  defp parameters({:one_of, atoms}),
    do: %{"type" => "one_of", "values" => Enum.map(atoms, &Atom.to_string/1)}

  defp parameters({:list, _type, max}), do: %{"type" => "list", "max_items" => max}

  defp parameters({:described, _words, {:list, _type, _max} = models}),
    do: %{parameters(models) | "type" => "models"}

  defp parameters({:described, _words, {:some, :image, max}}),
    do: %{"type" => "images", "min_items" => 1, "max_items" => max}

  defp text(type, 0, max), do: %{"type" => type, "max_bytes" => max}
  defp text(type, min, max), do: %{"type" => type, "min_bytes" => min, "max_bytes" => max}

  # No text is an empty one there.
  defp default({:text, 0, _max}, nil), do: %{"default" => ""}
  defp default(_type, nil), do: %{}

  defp default({:one_of, _atoms}, default), do: %{"default" => Atom.to_string(default)}
  defp default(_type, default), do: %{"default" => default}

  defp required(type), do: Map.put(facts(type), "required", true)
  defp timeout, do: facts(elem(Schema.options()[:timeout], 0))
end
