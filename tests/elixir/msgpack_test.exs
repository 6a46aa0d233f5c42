defmodule StarweaveImage.MsgpackTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.Msgpack

  defp encode(term), do: term |> Msgpack.encode!() |> IO.iodata_to_binary()

  # Term, bytes: the examples of the specification's tables, each the shortest form there is.
  @pairs [
    {nil, "C0"},
    {false, "C2"},
    {true, "C3"},
    {0, "00"},
    {127, "7F"},
    {128, "CC80"},
    {255, "CCFF"},
    {256, "CD0100"},
    {65_535, "CDFFFF"},
    {65_536, "CE00010000"},
    {0xFFFFFFFF, "CEFFFFFFFF"},
    {0x100000000, "CF0000000100000000"},
    {0xFFFFFFFFFFFFFFFF, "CFFFFFFFFFFFFFFFFF"},
    {-1, "FF"},
    {-32, "E0"},
    {-33, "D0DF"},
    {-128, "D080"},
    {-129, "D1FF7F"},
    {-32_768, "D18000"},
    {-32_769, "D2FFFF7FFF"},
    {-0x80000000, "D280000000"},
    {-0x80000001, "D3FFFFFFFF7FFFFFFF"},
    {-0x8000000000000000, "D38000000000000000"},
    {1.5, "CB3FF8000000000000"},
    {:nan, "CB7FF8000000000000"},
    {:infinity, "CB7FF0000000000000"},
    {:neg_infinity, "CBFFF0000000000000"},
    {"", "A0"},
    {"é", "A2C3A9"},
    {[], "90"},
    {[1, [2]], "92019102"},
    {%{}, "80"},
    {%{"a" => %{"b" => nil}}, "81A16181A162C0"},
    {%{1 => 2}, "810102"}
  ]

  test "terms and their bytes, both ways" do
    for {term, hex} <- @pairs do
      assert Base.encode16(encode(term)) == hex
      assert Msgpack.decode(Base.decode16!(hex)) == {:ok, term, ""}
    end
  end

  test "text, bytes, lists and maps at each size of header" do
    for {size, text, bytes} <- [
          {31, <<0xBF>>, <<0xC4, 31>>},
          {32, <<0xD9, 32>>, <<0xC4, 32>>},
          {255, <<0xD9, 255>>, <<0xC4, 255>>},
          {256, <<0xDA, 256::16>>, <<0xC5, 256::16>>},
          {65_535, <<0xDA, 65_535::16>>, <<0xC5, 65_535::16>>},
          {65_536, <<0xDB, 65_536::32>>, <<0xC6, 65_536::32>>}
        ] do
      content = String.duplicate("x", size)
      assert encode(content) == text <> content
      assert encode({:bin, content}) == bytes <> content
      assert Msgpack.decode(text <> content) == {:ok, content, ""}
      assert Msgpack.decode(bytes <> content) == {:ok, content, ""}
    end

    for {count, list, map} <- [
          {15, <<0x9F>>, <<0x8F>>},
          {16, <<0xDC, 16::16>>, <<0xDE, 16::16>>},
          {65_535, <<0xDC, 65_535::16>>, <<0xDE, 65_535::16>>},
          {65_536, <<0xDD, 65_536::32>>, <<0xDF, 65_536::32>>}
        ] do
      items = Enum.to_list(1..count)
      pairs = Map.new(items, &{&1, nil})
      assert String.starts_with?(encode(items), list)
      assert String.starts_with?(encode(pairs), map)
      assert Msgpack.decode(encode(items)) == {:ok, items, ""}
      # The largest map has more values than a message may.
      read = if count == 65_536, do: {:error, :too_many}, else: {:ok, pairs, ""}
      assert Msgpack.decode(encode(pairs)) == read
    end

    assert Msgpack.decode(<<0xDF, 2::32, 1, 2, 3, 4>>) == {:ok, %{1 => 2, 3 => 4}, ""}
  end

  test "a negative zero keeps its sign" do
    minus_zero = <<0xCB, 0x80, 0::56>>
    assert {:ok, zero, ""} = Msgpack.decode(minus_zero)
    assert encode(zero) == minus_zero
  end

  test "floats of 32 bits are read" do
    for {bits, float} <- [
          {0x3FC00000, 1.5},
          {0x00000001, 1.401298464324817e-45},
          {0x7FC00000, :nan},
          {0x7F800001, :nan},
          {0x7F800000, :infinity},
          {0xFF800000, :neg_infinity}
        ] do
      assert Msgpack.decode(<<0xCA, bits::32>>) == {:ok, float, ""}
    end
  end

  test "integers longer than they need be are read" do
    for {hex, integer} <- [
          {"CC01", 1},
          {"CD0001", 1},
          {"CE00000001", 1},
          {"CF0000000000000001", 1},
          {"D001", 1},
          {"D1FFFF", -1},
          {"D2FFFFFFFF", -1},
          {"D3FFFFFFFFFFFFFFFF", -1}
        ] do
      assert Msgpack.decode(Base.decode16!(hex)) == {:ok, integer, ""}
    end
  end

  test "atoms become text and never come back" do
    assert encode(%{png: :webp}) == "\x81\xA3png\xA4webp"
    assert Msgpack.decode("\x81\xA3png\xA4webp") == {:ok, %{"png" => "webp"}, ""}
  end

  test "what msgpack cannot say is refused" do
    for {term, reason} <- [
          {0x10000000000000000, {:unencodable, 0x10000000000000000}},
          {-0x8000000000000001, {:unencodable, -0x8000000000000001}},
          {<<0xFF>>, :invalid_utf8},
          {%{<<0xC3>> => 1}, :invalid_utf8},
          {{:bin, [:a]}, {:unencodable, {:bin, [:a]}}},
          {{1, 2}, {:unencodable, {1, 2}}},
          {<<1::1>>, {:unencodable, <<1::1>>}},
          {[1 | 2], {:unencodable, [1 | 2]}},
          {%URI{}, {:unencodable, %URI{}}}
        ] do
      assert Msgpack.encode([term]) == {:error, reason}
    end

    assert_raise ArgumentError, fn -> Msgpack.encode!({:ok, self()}) end
  end

  test "containers nest 32 deep and no deeper" do
    nested = fn depth -> Enum.reduce(2..depth, [], fn _, inner -> [inner] end) end
    assert Msgpack.decode(encode(nested.(32))) == {:ok, nested.(32), ""}
    assert Msgpack.encode(nested.(33)) == {:error, :too_deep}
    assert Msgpack.encode(%{"a" => nested.(32)}) == {:error, :too_deep}
    assert Msgpack.decode(String.duplicate(<<0x91>>, 32) <> <<0x90>>) == {:error, :too_deep}
    assert Msgpack.decode(String.duplicate(<<0x81, 0x00>>, 32) <> <<0x80>>) == {:error, :too_deep}
    assert Msgpack.decode(String.duplicate(<<0x91>>, 1_000_000)) == {:error, :too_deep}
  end

  test "131,072 values are read, and more are refused before one of them is made" do
    list = fn count, item -> <<0xDD, count::32>> <> :binary.copy(item, count) end
    assert {:ok, values, ""} = Msgpack.decode(list.(131_071, <<0x80>>))
    assert length(values) == 131_071
    assert Msgpack.decode(list.(131_072, <<0x80>>)) == {:error, :too_many}

    assert Msgpack.decode(list.(8_192, <<0x9F>> <> :binary.copy(<<1>>, 15))) ==
             {:error, :too_many}

    pairs = <<0xDF, 65_536::32>> <> :binary.copy(<<0xA1, "y", 0xC0>>, 65_536)
    assert Msgpack.decode(pairs) == {:error, :too_many}

    # A process whose heap has no room for them.
    million = list.(30_000_000, <<0xC0>>)

    {pid, monitor} =
      :erlang.spawn_opt(fn -> exit(Msgpack.decode(million)) end, [
        :monitor,
        {:max_heap_size, %{size: 10_000, kill: true, error_logger: false}}
      ])

    assert_receive {:DOWN, ^monitor, :process, ^pid, {:error, :too_many}}, 5_000
  end

  test "of equal keys the last counts" do
    assert Msgpack.decode("\x82\xA1a\x01\xA1a\x02") == {:ok, %{"a" => 2}, ""}
  end

  test "what follows the term is given back" do
    assert Msgpack.decode(<<0x93, 1, 2, 3, "rest">>) == {:ok, [1, 2, 3], "rest"}
  end

  test "every proper beginning of a term is truncated" do
    term = %{"a" => [1, -1_000, 1.5, "text", {:bin, <<0, 255>>}, nil], "b" => %{"c" => []}}
    bytes = encode(term)
    assert {:ok, _, ""} = Msgpack.decode(bytes)

    for size <- 0..(byte_size(bytes) - 1) do
      assert Msgpack.decode(binary_part(bytes, 0, size)) == {:error, :truncated}
    end
  end

  test "bytes that are no msgpack say why" do
    for {hex, reason} <- [
          {"C1", :reserved_byte},
          {"A2C328", :invalid_utf8},
          {"A3EDA080", :invalid_utf8},
          {"C700", :extension},
          {"C9", :extension},
          {"D40500", :extension},
          {"D6FF00000000", :extension}
        ] do
      assert Msgpack.decode(Base.decode16!(hex)) == {:error, reason}
    end
  end

  test "a length above what is there costs nothing" do
    for header <- [<<0xDD>>, <<0xDF>>, <<0xDB>>, <<0xC6>>] do
      claim = header <> <<0xFFFFFFFF::32>>
      {:ok, words} = reductions(fn -> Msgpack.decode(claim <> "x") end)
      assert words < 1_000
      # Each of them claims as much as there is behind it, and all of them fail in one pass.
      assert {:error, _} = Msgpack.decode(String.duplicate(<<0xDC, 1_000::16>>, 1_000))
    end
  end

  test "no atoms are made of text from outside" do
    text = "an atom that nobody wrote #{System.unique_integer()}"
    assert {:ok, %{^text => ^text}, ""} = Msgpack.decode(encode(%{text => text}))
    assert_raise ArgumentError, fn -> String.to_existing_atom(text) end
  end

  test "large payloads are not copied, in either direction" do
    payload = :crypto.strong_rand_bytes(1_000_000)
    message = %{"t" => "image", "data" => {:bin, payload}}

    assert Enum.any?(flatten(Msgpack.encode!(message)), &:erts_debug.same(&1, payload))

    bytes = encode(message)
    assert {:ok, %{"data" => ^payload = data}, ""} = Msgpack.decode(bytes)
    assert :binary.referenced_byte_size(data) == byte_size(bytes)
  end

  defp flatten([head | tail]), do: flatten(head) ++ flatten(tail)
  defp flatten([]), do: []
  defp flatten(binary) when is_binary(binary), do: [binary]

  defp reductions(function) do
    {:reductions, before} = Process.info(self(), :reductions)
    {:error, :truncated} = function.()
    {:reductions, later} = Process.info(self(), :reductions)
    {:ok, later - before}
  end
end
