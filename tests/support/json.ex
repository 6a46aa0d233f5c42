defmodule StarweaveImage.TestJSON do
  @moduledoc """
  A JSON decoder for the contract's files, since OTP has none before 27.

      iex> StarweaveImage.TestJSON.decode!(~S({"a": [1, -2.5e3, "\\u00e9\\ud83c\\udf4e", null, true]}))
      %{"a" => [1, -2500.0, "é🍎", nil, true]}
  """

  @spec decode!(binary) :: term
  def decode!(text) do
    {value, rest} = text |> skip() |> value()
    "" = skip(rest)
    value
  end

  defp skip(<<c, rest::binary>>) when c in ~c" \t\r\n", do: skip(rest)
  defp skip(rest), do: rest

  defp value("null" <> rest), do: {nil, rest}
  defp value("true" <> rest), do: {true, rest}
  defp value("false" <> rest), do: {false, rest}
  defp value("\"" <> rest), do: string(rest, [])
  defp value("[" <> rest), do: list(skip(rest), [])
  defp value("{" <> rest), do: object(skip(rest), %{})
  defp value(rest), do: number(rest)

  defp list("]" <> rest, []), do: {[], rest}

  defp list(rest, items) do
    {item, rest} = value(rest)

    case skip(rest) do
      "," <> rest -> list(skip(rest), [item | items])
      "]" <> rest -> {Enum.reverse([item | items]), rest}
    end
  end

  defp object("}" <> rest, map) when map == %{}, do: {map, rest}

  defp object("\"" <> rest, map) do
    {key, rest} = string(rest, [])
    ":" <> rest = skip(rest)
    {item, rest} = rest |> skip() |> value()
    map = Map.put(map, key, item)

    case skip(rest) do
      "," <> rest -> object(skip(rest), map)
      "}" <> rest -> {map, rest}
    end
  end

  @escapes %{
    ?" => ?",
    ?\\ => ?\\,
    ?/ => ?/,
    ?b => ?\b,
    ?f => ?\f,
    ?n => ?\n,
    ?r => ?\r,
    ?t => ?\t
  }

  defp string("\"" <> rest, acc), do: {acc |> Enum.reverse() |> List.to_string(), rest}

  defp string("\\u" <> <<hex::binary-size(4), rest::binary>>, acc) do
    case {String.to_integer(hex, 16), rest} do
      {high, "\\u" <> <<hex::binary-size(4), rest::binary>>} when high in 0xD800..0xDBFF ->
        low = String.to_integer(hex, 16)
        string(rest, [0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00 | acc])

      {char, rest} ->
        string(rest, [char | acc])
    end
  end

  defp string(<<?\\, c, rest::binary>>, acc), do: string(rest, [Map.fetch!(@escapes, c) | acc])
  defp string(<<c::utf8, rest::binary>>, acc), do: string(rest, [c | acc])

  defp number(text) do
    [digits] = Regex.run(~r/\A-?\d+(\.\d+)?([eE][+-]?\d+)?/, text, capture: :first)
    rest = binary_part(text, byte_size(digits), byte_size(text) - byte_size(digits))

    cond do
      not (digits =~ ~r/[.eE]/) -> {String.to_integer(digits), rest}
      digits =~ "." -> {String.to_float(digits), rest}
      true -> {digits |> String.replace(~r/[eE]/, ".0e") |> String.to_float(), rest}
    end
  end
end
