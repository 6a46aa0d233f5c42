defmodule StarweaveImage.TestTypes do
  @moduledoc false
  # Compares a value with a documented type, so that the documentation of maps cannot drift from what is returned.

  @doc "Where `value` is not of the type `name` of `module`: paths and what stands there; none if it is."
  @spec mismatches(module, atom, term) :: [String.t()]
  def mismatches(module, name, value),
    do: check(user_type(module, name), value, module, "#{name}")

  defp user_type(module, name) do
    {:ok, types} = Code.Typespec.fetch_types(module)
    Enum.find_value(types, fn {_kind, {found, form, []}} -> found == name && form end)
  end

  defp check({:user_type, _, name, []}, value, module, path),
    do: check(user_type(module, name), value, module, path)

  defp check({:remote_type, _, [{:atom, _, String}, {:atom, _, :t}, []]}, value, _, path),
    do: unless_right(is_binary(value) and String.valid?(value), value, path)

  # A struct's own fields are its module's matter.
  defp check({:remote_type, _, [{:atom, _, module}, {:atom, _, :t}, []]}, value, _, path),
    do: unless_right(is_struct(value, module), value, path)

  defp check({:type, _, :union, types}, value, module, path) do
    alternatives = Enum.map(types, &check(&1, value, module, path))
    # The nearest one says most.
    if [] in alternatives, do: [], else: Enum.max_by(alternatives, &deepest/1)
  end

  defp check({:type, _, :tuple, types}, value, module, path)
       when is_tuple(value) and tuple_size(value) == length(types) do
    for {type, index} <- Enum.with_index(types),
        wrong <- check(type, elem(value, index), module, "#{path}.#{index}"),
        do: wrong
  end

  defp check({:type, _, :list, [type]}, value, module, path) when is_list(value) do
    for {item, index} <- Enum.with_index(value),
        wrong <- check(type, item, module, "#{path}[#{index}]"),
        do: wrong
  end

  defp check({:type, _, :map, fields}, value, module, path)
       when is_map(value) and not is_struct(value) do
    exact = for {:type, _, :map_field_exact, [{:atom, _, key}, type]} <- fields, do: {key, type}
    optional = for {:type, _, :map_field_assoc, pair} <- fields, do: pair
    {named, others} = Map.split(value, Keyword.keys(exact))
    missing = for {key, _} <- exact, not is_map_key(named, key), do: "#{path}.#{key} is missing"

    wrong =
      for {key, type} <- exact,
          is_map_key(named, key),
          wrong <- check(type, named[key], module, "#{path}.#{key}"),
          do: wrong

    unknown =
      for {key, value} <- others,
          not Enum.any?(optional, fn [k, v] ->
            check(k, key, module, path) == [] and check(v, value, module, path) == []
          end),
          do: "#{path}.#{key} is undocumented: #{inspect(value)}"

    missing ++ wrong ++ unknown
  end

  defp check({:atom, _, atom}, value, _, path), do: unless_right(value === atom, value, path)
  defp check({:type, _, :boolean, []}, value, _, p), do: unless_right(is_boolean(value), value, p)
  defp check({:type, _, :float, []}, value, _, p), do: unless_right(is_float(value), value, p)
  defp check({:type, _, :binary, []}, value, _, p), do: unless_right(is_binary(value), value, p)

  defp check({:type, _, :pos_integer, []}, value, _, path),
    do: unless_right(is_integer(value) and value > 0, value, path)

  defp check({:type, _, :non_neg_integer, []}, value, _, path),
    do: unless_right(is_integer(value) and value >= 0, value, path)

  defp check(_type, value, _module, path), do: unless_right(false, value, path)

  defp unless_right(true, _value, _path), do: []
  defp unless_right(false, value, path), do: ["#{path} is #{inspect(value, limit: 5)}"]

  defp deepest(mismatches), do: mismatches |> Enum.map(&String.length/1) |> Enum.max()
end
