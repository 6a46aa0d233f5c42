defmodule StarweaveImage.Journal.Log do
  @moduledoc false

  # The bytes of an append-only log, without a file:
  #
  #     marker   4 bytes   C1 53 57 01
  #     size     u32       bytes of the payload as it stands here, at most 64 MiB
  #     sum      u32       CRC-32 of the payload as it stands here
  #     check    u32       CRC-32 of the 12 bytes before
  #     payload            with a 00 put behind every C1 53 57 in it
  #
  # So the marker stands nowhere but at the start of a record: after damage the next record is found by it,
  # and nothing that a user put into a prompt or a picture is ever taken for one.
  #
  # The check makes a length trustworthy before anything is read for it, and tells a record whose end was
  # never written (a torn tail: power was lost, the process killed) from one that was damaged later.

  @prefix <<0xC1, "SW">>
  @marker <<@prefix::binary, 1>>
  @header 16
  @max_size 64 * 1024 * 1024
  @chunk 64 * 1024

  @typedoc "Where a record stands, and all of its bytes."
  @type place :: {offset :: non_neg_integer, size :: pos_integer}

  @typedoc "The bytes from an offset on: as many as were asked for, and all of them inside the log."
  @type read ::
          (offset :: non_neg_integer, count :: pos_integer ->
             {:ok, binary} | {:error, reason :: atom})

  @spec record(iodata) :: {:ok, iodata} | {:error, :too_large}
  def record(payload) do
    payload = payload |> IO.iodata_to_binary() |> escape()
    size = byte_size(payload)

    if size <= @max_size do
      head = <<@marker, size::32, :erlang.crc32(payload)::32>>
      {:ok, [head, <<:erlang.crc32(head)::32>>, payload]}
    else
      {:error, :too_large}
    end
  end

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
    {acc, damaged, torn} = walk(read, 0, size, acc, fun, 0)
    {:ok, acc, %{damaged: damaged, torn: torn}}
  catch
    {__MODULE__, reason} -> {:error, reason}
  end

  defp walk(_read, size, size, acc, _fun, damaged), do: {acc, damaged, 0}

  defp walk(read, offset, size, acc, fun, damaged) do
    case at(read, offset, size) do
      {:ok, payload, next} ->
        case fun.(payload, {offset, next - offset}, acc) do
          {:ok, acc} -> walk(read, next, size, acc, fun, damaged)
          :damaged -> walk(read, next, size, acc, fun, damaged + 1)
        end

      bad ->
        case next(read, offset + 1, size) do
          nil when bad == :torn -> {acc, damaged, size - offset}
          nil -> {acc, damaged + 1, 0}
          next -> walk(read, next, size, acc, fun, damaged + 1)
        end
    end
  end

  defp at(_read, offset, size) when size - offset < @header, do: :torn

  defp at(read, offset, size) do
    with <<@marker, length::32, sum::32, check::32>> = header <- bytes(read, offset, @header),
         true <- :erlang.crc32(binary_part(header, 0, 12)) == check and length <= @max_size do
      next = offset + @header + length
      if next > size, do: :torn, else: whole(bytes(read, offset + @header, length), sum, next)
    else
      # What a file system may leave of a file that grew and was not written.
      <<0::128>> -> if zeros?(read, offset, size), do: :torn, else: :damaged
      _no_header -> :damaged
    end
  end

  defp whole(payload, sum, next),
    do: if(:erlang.crc32(payload) == sum, do: {:ok, unescape(payload), next}, else: :damaged)

  # The next offset, from this one on, at which a whole record stands.
  defp next(_read, offset, size) when size - offset < @header, do: nil

  defp next(read, offset, size) do
    count = min(@chunk, size - offset)

    case :binary.match(bytes(read, offset, count), @marker) do
      {found, _} ->
        case at(read, offset + found, size) do
          {:ok, _payload, _next} -> offset + found
          _bad -> next(read, offset + found + 1, size)
        end

      # A marker may begin in the last three bytes.
      :nomatch when count == @chunk ->
        next(read, offset + count - 3, size)

      :nomatch ->
        nil
    end
  end

  defp zeros?(_read, size, size), do: true

  defp zeros?(read, offset, size) do
    count = min(@chunk, size - offset)

    bytes(read, offset, count) == <<0::size(count)-unit(8)>> and
      zeros?(read, offset + count, size)
  end

  defp bytes(_read, _offset, 0), do: ""

  defp bytes(read, offset, count) do
    case read.(offset, count) do
      {:ok, bytes} -> bytes
      # Not damage: what cannot be read now may be there the next time.
      {:error, reason} -> throw({__MODULE__, reason})
    end
  end

  defp escape(payload), do: :binary.replace(payload, @prefix, @prefix <> <<0>>, [:global])
  defp unescape(payload), do: :binary.replace(payload, @prefix <> <<0>>, @prefix, [:global])
end
