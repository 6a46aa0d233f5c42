defmodule StarweaveImage.Contract do
  @moduledoc "Reads the contract's files; tests/contract/README.md says what is in them."

  alias StarweaveImage.TestJSON

  @folder Path.expand("../contract", __DIR__)

  @spec load(String.t()) :: [map]
  def load(name) do
    @folder |> Path.join(name) |> File.stream!() |> Enum.map(&TestJSON.decode!/1)
  end

  @doc "A value with its tags replaced. Byte strings are binaries, as `Msgpack.decode/1` gives them."
  @spec expand(term) :: term
  def expand(%{"$float" => "nan"}), do: :nan
  def expand(%{"$float" => "inf"}), do: :infinity
  def expand(%{"$float" => "-inf"}), do: :neg_infinity
  def expand(%{"$bytes" => text}), do: Base.decode64!(text)
  def expand(%{"$invalid_utf8" => text}), do: Base.decode64!(text)
  def expand(%{"$repeat" => [item, count]}), do: item |> expand() |> :binary.copy(count)
  def expand(%{"$concat" => items}), do: Enum.map_join(items, &expand/1)
  def expand(map) when is_map(map), do: Map.new(map, fn {key, item} -> {key, expand(item)} end)
  def expand(list) when is_list(list), do: Enum.map(list, &expand/1)
  def expand(value), do: value
end
