defmodule StarweaveImage.Journal.Log do
  @moduledoc false

  # The bytes of an append-only log, without a file. A record is
  #
  #     marker   4 bytes   C1 53 57 01
  #     mask     4 bytes   what the body is XORed with, over and over; mostly 0
  #     size     u32       bytes of the body, at most 64 MiB
  #     sum      u32       CRC-32 of the body
  #     check    u32       CRC-32 of the 16 bytes before
  #     body               the payload, masked, and FF
  #
  # The mask is chosen so that the marker is not in the body. So it stands nowhere but at the start of a
  # record: after damage the next record is found by it, and nothing that a user put into a prompt or a picture
  # is ever taken for one.
  #
  # The check makes a size trustworthy before anything is read for it. Together with the FF, which tells the
  # end of a record from the zeros of a file that grew and was not written, it tells a record whose end was
  # never written (a torn tail: power was lost, the process killed) from one that was damaged later.

  @marker <<0xC1, "SW", 1>>
  @header 20
  @max_size 64 * 1024 * 1024
  @chunk 64 * 1024

  @typedoc "Where a record stands, and all of its bytes."
  @type place :: {offset :: non_neg_integer, size :: pos_integer}

  @typedoc "The bytes from an offset on: as many as were asked for, and all of them inside the log."
  @type read ::
          (offset :: non_neg_integer, count :: pos_integer ->
             {:ok, binary} | {:error, reason :: atom})

  @spec record(binary) :: {:ok, iodata} | {:error, :too_large}
  def record(payload) when byte_size(payload) < @max_size do
    {mask, masked} = masked(payload, <<0::32>>)
    body = [masked, 0xFF]
    head = <<@marker, mask::binary, byte_size(payload) + 1::32, :erlang.crc32(body)::32>>
    {:ok, [head, <<:erlang.crc32(head)::32>> | body]}
  end

  def record(_payload), do: {:error, :too_large}

  @doc "The payload of the record that stands at a place, if it is whole."
  @spec payload(read, place) :: {:ok, binary} | :damaged | {:error, atom}
  def payload(read, {offset, size}) do
    case at(read, offset, offset + size) do
      {:ok, payload, next} when next == offset + size -> {:ok, payload}
      _bad -> :damaged
    end
  catch
    {__MODULE__, reason} -> {:error, reason}
  end

  @doc """
  Folds over the payloads of a log of `size` bytes, which `fun` may call damaged in its turn.

  `damaged` counts the places where something that was written is not readable; `torn` are the bytes
  of a last record that was never written to its end, and no damage.
  """
  @spec fold(read, non_neg_integer, acc, (binary, place, acc -> {:ok, acc} | :damaged)) ::
          {:ok, acc, %{damaged: non_neg_integer, torn: non_neg_integer}} | {:error, atom}
        when acc: term
  def fold(read, size, acc, fun) do
    {acc, damaged, last} = walk(read, 0, without_zeros(read, size), acc, fun, 0)
    {:ok, acc, %{damaged: damaged, torn: size - last}}
  catch
    {__MODULE__, reason} -> {:error, reason}
  end

  defp walk(_read, size, size, acc, _fun, damaged), do: {acc, damaged, size}

  defp walk(read, offset, size, acc, fun, damaged) do
    case at(read, offset, size) do
      {:ok, payload, next} ->
        case fun.(payload, {offset, next - offset}, acc) do
          {:ok, acc} -> walk(read, next, size, acc, fun, damaged)
          :damaged -> walk(read, next, size, acc, fun, damaged + 1)
        end

      bad ->
        case next(read, offset + 1, size) do
          nil when bad == :torn -> {acc, damaged, offset}
          nil -> {acc, damaged + 1, size}
          next -> walk(read, next, size, acc, fun, damaged + 1)
        end
    end
  end

  defp at(_read, offset, size) when size - offset < @header, do: :torn

  defp at(read, offset, size) do
    header = bytes(read, offset, @header)

    with <<@marker, mask::binary-size(4), length::32, sum::32, check::32>> <- header,
         true <- :erlang.crc32(binary_part(header, 0, 16)) == check and length <= @max_size do
      next = offset + @header + length

      if next > size,
        do: :torn,
        else: whole(bytes(read, offset + @header, length), mask, sum, next)
    else
      _no_header -> :damaged
    end
  end

  defp whole(body, mask, sum, next) do
    if :erlang.crc32(body) == sum and body != "" and :binary.last(body) == 0xFF,
      do: {:ok, body |> binary_part(0, byte_size(body) - 1) |> unmasked(mask), next},
      else: :damaged
  end

  # The next offset, from this one on, at which a whole record stands.
  defp next(_read, offset, size) when size - offset < @header, do: nil

  defp next(read, offset, size) do
    count = min(@chunk, size - offset)
    found = read |> bytes(offset, count) |> :binary.matches(@marker)

    case Enum.find(found, fn {at, _} -> match?({:ok, _, _}, at(read, offset + at, size)) end) do
      {at, _} -> offset + at
      # A marker may begin in the last three bytes.
      nil when count == @chunk -> next(read, offset + count - 3, size)
      nil -> nil
    end
  end

  # The size without the zeros at the end.
  defp without_zeros(_read, 0), do: 0

  defp without_zeros(read, size) do
    count = min(@chunk, size)

    case zeros(bytes(read, size - count, count), count) do
      ^count -> without_zeros(read, size - count)
      zeros -> size - zeros
    end
  end

  defp zeros(bytes, count) when count > 0 do
    if :binary.last(bytes) == 0,
      do: 1 + zeros(binary_part(bytes, 0, count - 1), count - 1),
      else: 0
  end

  defp zeros(_bytes, 0), do: 0

  defp bytes(_read, _offset, 0), do: ""

  defp bytes(read, offset, count) do
    case read.(offset, count) do
      {:ok, bytes} -> bytes
      # Not damage: what cannot be read now may be there the next time.
      {:error, reason} -> throw({__MODULE__, reason})
    end
  end

  defp masked(payload, mask) do
    masked = unmasked(payload, mask)

    if :binary.match(masked, @marker) == :nomatch,
      do: {mask, masked},
      else: masked(payload, :crypto.strong_rand_bytes(4))
  end

  defp unmasked(payload, <<0::32>>), do: payload

  defp unmasked(payload, mask) do
    size = byte_size(payload)
    :crypto.exor(payload, binary_part(:binary.copy(mask, div(size, 4) + 1), 0, size))
  end
end
