defmodule StarweaveImage.Msgpack do
  @moduledoc false

  # MessagePack, as far as the wire and the journal need it: every type but the extension types.
  #
  #     Elixir                          msgpack                    and back
  #     nil, true, false                nil, bool                  the same
  #     any other atom                  str                        binary, never an atom
  #     integer, -2^63..2^64-1          the shortest int           integer
  #     float                           float 64                   float (float 32 is read too)
  #     :nan, :infinity, :neg_infinity  float 64                   the same atoms
  #     binary, valid UTF-8             str                        binary, checked to be UTF-8
  #     {:bin, iodata}                  bin                        binary
  #     list                            array                      list
  #     map                             map                        map, the last of equal keys wins
  #
  # Encoding gives iodata that refers to large binaries instead of copying them; decoded binaries
  # are parts of the input and keep it alive. Both directions take containers at most 32 deep, and
  # a length is compared with the bytes that are left before anything is allocated for it. A
  # container whose values, with all those before it, are too many is refused at its header.

  @max_depth 32
  @max_values 131_072

  @type reason ::
          :truncated
          | :reserved_byte
          | :invalid_utf8
          | :too_deep
          | :too_many
          | :extension
          | {:unencodable, term}

  @spec encode(term) :: {:ok, iodata} | {:error, reason}
  def encode(term) do
    {:ok, pack(term, 0)}
  catch
    {__MODULE__, reason} -> {:error, reason}
  end

  @spec encode!(term) :: iodata
  def encode!(term) do
    case encode(term) do
      {:ok, iodata} -> iodata
      {:error, reason} -> raise ArgumentError, "not a msgpack term: #{inspect(reason)}"
    end
  end

  @spec decode(binary) :: {:ok, term, rest :: binary} | {:error, reason}
  def decode(bytes) when is_binary(bytes),
    do: value(bytes, :one, 1, [], [], {0, @max_values - 1})

  ## Encoding

  defp pack(nil, _depth), do: <<0xC0>>
  defp pack(false, _depth), do: <<0xC2>>
  defp pack(true, _depth), do: <<0xC3>>
  defp pack(:nan, _depth), do: <<0xCB, 0x7FF8000000000000::64>>
  defp pack(:infinity, _depth), do: <<0xCB, 0x7FF0000000000000::64>>
  defp pack(:neg_infinity, _depth), do: <<0xCB, 0xFFF0000000000000::64>>
  defp pack(atom, _depth) when is_atom(atom), do: pack_str(Atom.to_string(atom))

  defp pack(int, _depth) when is_integer(int) do
    cond do
      int in 0..0x7F -> <<int>>
      int in -32..-1 -> <<int>>
      int in 0..0xFF -> <<0xCC, int>>
      int in 0..0xFFFF -> <<0xCD, int::16>>
      int in 0..0xFFFFFFFF -> <<0xCE, int::32>>
      int in 0..0xFFFFFFFFFFFFFFFF -> <<0xCF, int::64>>
      int in -0x80..-1 -> <<0xD0, int>>
      int in -0x8000..-1 -> <<0xD1, int::16>>
      int in -0x80000000..-1 -> <<0xD2, int::32>>
      int in -0x8000000000000000..-1 -> <<0xD3, int::64>>
      true -> fail({:unencodable, int})
    end
  end

  defp pack(float, _depth) when is_float(float), do: <<0xCB, float::float-64>>
  defp pack(string, _depth) when is_binary(string), do: pack_str(string)

  defp pack({:bin, iodata}, _depth) do
    case iodata_length(iodata) do
      size when size <= 0xFF -> [<<0xC4, size>> | iodata]
      size when size <= 0xFFFF -> [<<0xC5, size::16>> | iodata]
      size when size <= 0xFFFFFFFF -> [<<0xC6, size::32>> | iodata]
      _ -> fail({:unencodable, :too_long})
    end
  end

  defp pack(container, @max_depth) when is_list(container) or is_map(container),
    do: fail(:too_deep)

  defp pack(list, depth) when is_list(list) do
    header =
      case list_length(list) do
        count when count <= 0xF -> <<0x9::4, count::4>>
        count when count <= 0xFFFF -> <<0xDC, count::16>>
        count when count <= 0xFFFFFFFF -> <<0xDD, count::32>>
      end

    [header | for(item <- list, do: pack(item, depth + 1))]
  end

  defp pack(%_{} = struct, _depth), do: fail({:unencodable, struct})

  defp pack(map, depth) when is_map(map) do
    header =
      case map_size(map) do
        count when count <= 0xF -> <<0x8::4, count::4>>
        count when count <= 0xFFFF -> <<0xDE, count::16>>
        count when count <= 0xFFFFFFFF -> <<0xDF, count::32>>
      end

    [header | for({key, item} <- map, do: [pack(key, depth + 1) | pack(item, depth + 1)])]
  end

  defp pack(term, _depth), do: fail({:unencodable, term})

  defp pack_str(string) do
    String.valid?(string) || fail(:invalid_utf8)

    case byte_size(string) do
      size when size <= 31 -> [<<0b101::3, size::5>> | string]
      size when size <= 0xFF -> [<<0xD9, size>> | string]
      size when size <= 0xFFFF -> [<<0xDA, size::16>> | string]
      size when size <= 0xFFFFFFFF -> [<<0xDB, size::32>> | string]
    end
  end

  defp iodata_length(iodata) do
    IO.iodata_length(iodata)
  rescue
    ArgumentError -> fail({:unencodable, {:bin, iodata}})
  end

  defp list_length(list) do
    length(list)
  rescue
    ArgumentError -> fail({:unencodable, list})
  end

  defp fail(reason), do: throw({__MODULE__, reason})

  ## Decoding
  #
  # One pass of tail calls, so that a failure needs no unwinding and the match context is reused from value to value
  # (which is why even `next` and `str` match on `<<rest::binary>>`). The open container is in the arguments: its kind
  # (:list, :map, or :one for the value asked for), how many values it still lacks (keys count), and those read, last
  # first; `stack` holds the containers around it; `depth` is their number and how many values may still come.

  defguardp is_enough(bytes, count) when byte_size(bytes) >= count

  defp value(<<0::1, n::7, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n, kind, left, acc, stack, depth)

  defp value(<<0b101::3, size::5, s::binary-size(size), rest::binary>>, k, l, acc, stack, d),
    do: str(rest, s, k, l, acc, stack, d)

  defp value(<<0x8::4, count::4, rest::binary>>, kind, left, acc, stack, depth),
    do: open(rest, :map, 2 * count, kind, left, acc, stack, depth)

  defp value(<<0x9::4, count::4, rest::binary>>, kind, left, acc, stack, depth),
    do: open(rest, :list, count, kind, left, acc, stack, depth)

  defp value(<<0b111::3, n::5, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n - 32, kind, left, acc, stack, depth)

  defp value(<<0xC0, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, nil, kind, left, acc, stack, depth)

  defp value(<<0xC2, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, false, kind, left, acc, stack, depth)

  defp value(<<0xC3, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, true, kind, left, acc, stack, depth)

  defp value(<<0xC4, size, b::binary-size(size), rest::binary>>, k, l, acc, stack, d),
    do: next(rest, b, k, l, acc, stack, d)

  defp value(<<0xC5, size::16, b::binary-size(size), rest::binary>>, k, l, acc, stack, d),
    do: next(rest, b, k, l, acc, stack, d)

  defp value(<<0xC6, size::32, b::binary-size(size), rest::binary>>, k, l, acc, stack, d),
    do: next(rest, b, k, l, acc, stack, d)

  defp value(<<0xCA, f::float-32, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, f, kind, left, acc, stack, depth)

  # Not-a-number and the infinities, which the float pattern refuses.
  defp value(<<0xCA, sign::1, 0xFF, bits::23, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, special(sign, bits), kind, left, acc, stack, depth)

  defp value(<<0xCB, f::float-64, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, f, kind, left, acc, stack, depth)

  defp value(<<0xCB, sign::1, 0x7FF::11, bits::52, rest::binary>>, k, l, acc, stack, d),
    do: next(rest, special(sign, bits), k, l, acc, stack, d)

  defp value(<<0xCC, n, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n, kind, left, acc, stack, depth)

  defp value(<<0xCD, n::16, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n, kind, left, acc, stack, depth)

  defp value(<<0xCE, n::32, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n, kind, left, acc, stack, depth)

  defp value(<<0xCF, n::64, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n, kind, left, acc, stack, depth)

  defp value(<<0xD0, n::signed, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n, kind, left, acc, stack, depth)

  defp value(<<0xD1, n::16-signed, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n, kind, left, acc, stack, depth)

  defp value(<<0xD2, n::32-signed, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n, kind, left, acc, stack, depth)

  defp value(<<0xD3, n::64-signed, rest::binary>>, kind, left, acc, stack, depth),
    do: next(rest, n, kind, left, acc, stack, depth)

  defp value(<<0xD9, size, s::binary-size(size), rest::binary>>, k, l, acc, stack, d),
    do: str(rest, s, k, l, acc, stack, d)

  defp value(<<0xDA, size::16, s::binary-size(size), rest::binary>>, k, l, acc, stack, d),
    do: str(rest, s, k, l, acc, stack, d)

  defp value(<<0xDB, size::32, s::binary-size(size), rest::binary>>, k, l, acc, stack, d),
    do: str(rest, s, k, l, acc, stack, d)

  defp value(<<0xDC, count::16, rest::binary>>, kind, left, acc, stack, depth),
    do: open(rest, :list, count, kind, left, acc, stack, depth)

  defp value(<<0xDD, count::32, rest::binary>>, kind, left, acc, stack, depth),
    do: open(rest, :list, count, kind, left, acc, stack, depth)

  defp value(<<0xDE, count::16, rest::binary>>, kind, left, acc, stack, depth),
    do: open(rest, :map, 2 * count, kind, left, acc, stack, depth)

  defp value(<<0xDF, count::32, rest::binary>>, kind, left, acc, stack, depth),
    do: open(rest, :map, 2 * count, kind, left, acc, stack, depth)

  defp value(<<byte, _::binary>>, _kind, _left, _acc, _stack, _depth)
       when byte in 0xC7..0xC9 or byte in 0xD4..0xD8,
       do: {:error, :extension}

  defp value(<<0xC1, _::binary>>, _kind, _left, _acc, _stack, _depth),
    do: {:error, :reserved_byte}

  defp value(_bytes, _kind, _left, _acc, _stack, _depth), do: {:error, :truncated}

  defp open(_rest, _new, _count, _kind, _left, _acc, _stack, {@max_depth, _room}),
    do: {:error, :too_deep}

  defp open(rest, new, 0, kind, left, acc, stack, depth),
    do: next(rest, close(new, []), kind, left, acc, stack, depth)

  # Every value takes a byte at least, so that a container cannot promise more than the input has.
  defp open(rest, _new, count, _kind, _left, _acc, _stack, _depth)
       when not is_enough(rest, count),
       do: {:error, :truncated}

  defp open(_rest, _new, count, _kind, _left, _acc, _stack, {_depth, room}) when count > room,
    do: {:error, :too_many}

  defp open(rest, new, count, kind, left, acc, stack, {depth, room}),
    do: value(rest, new, count, [], [{kind, left, acc} | stack], {depth + 1, room - count})

  defp next(<<rest::binary>>, term, :one, 1, [], [], _depth), do: {:ok, term, rest}

  defp next(
         <<rest::binary>>,
         term,
         kind,
         1,
         acc,
         [{outer, left, outer_acc} | stack],
         {depth, room}
       ),
       do: next(rest, close(kind, [term | acc]), outer, left, outer_acc, stack, {depth - 1, room})

  defp next(<<rest::binary>>, term, kind, left, acc, stack, depth),
    do: value(rest, kind, left - 1, [term | acc], stack, depth)

  defp close(:list, acc), do: :lists.reverse(acc)
  defp close(:map, acc), do: :maps.from_list(pairs(acc, []))

  defp pairs([item, key | acc], pairs), do: pairs(acc, [{key, item} | pairs])
  defp pairs([], pairs), do: pairs

  defp str(<<rest::binary>>, string, kind, left, acc, stack, depth) do
    if String.valid?(string),
      do: next(rest, string, kind, left, acc, stack, depth),
      else: {:error, :invalid_utf8}
  end

  defp special(_sign, bits) when bits != 0, do: :nan
  defp special(0, 0), do: :infinity
  defp special(1, 0), do: :neg_infinity
end
